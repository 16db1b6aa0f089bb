"""A classifier that votes in an order laid down before, whatever it sees."""

import torch
from torch import nn
from torch.nn import functional as F


class ScriptedVotes(nn.Module):
    """Calls its inputs, one after another, what the next entries of ``votes`` say."""

    def __init__(self, votes, classes):
        super().__init__()
        self.votes, self.classes, self.given = torch.as_tensor(votes), classes, 0

    def forward(self, x):
        first, self.given = self.given, self.given + len(x)
        return F.one_hot(self.votes[first : self.given], self.classes).float()
