"""Operations made of others: how each is written with those that have lines or planes.

A rule takes the arguments of an operation, traced, and returns the same value written out; None
where the operation stays as it is (it is then cut at its interval). The interval of the operation
itself is at least as tight as that of the parts, so results are met with it.

Source: Z. Shi et al., "Robustness Verification for Transformers", ICLR 2020, arXiv 2002.06622
(attention and layer norm by parts).
Departures: softmax through the log-sum-exp of the other elements
(:mod:`pyrobust.certify.relaxation.log_sums`); the reciprocal of the root in one step.
"""
