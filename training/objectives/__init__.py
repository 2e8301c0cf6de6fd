"""Losses beside the language model's. Their heads are trained along and never become part of the model."""
