"""Faster ways to compute adapted layers: what a provider is, the providers, and the gradient over them."""
