"""Figures about a trained model. Read perplexity.py."""
