"""Training data: where samples come from, and what is done with them before they are batches."""
