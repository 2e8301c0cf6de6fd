"""Change a part of a trained model and keep most of what it knew."""
