"""Many machines: one queue of concepts for the workers of a Ray cluster."""
