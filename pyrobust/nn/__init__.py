"""Modules that mirror torch.nn: packed layers, SmoothedClassifier, methods that are layers."""
