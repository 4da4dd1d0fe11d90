"""A base model as the rest uses it: its networks and parameters, noise schedule, schedulers and prompts."""
