"""What of a model is trained, how fast, and with which adapters."""
