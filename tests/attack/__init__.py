"""Attacks on the product: `make fuzz` mutates what every reader reads, `make kills` interrupts runs at any moment."""
