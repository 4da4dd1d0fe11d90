"""Checkpoints of other layouts into our parameter trees, by tables that must cover everything."""
