"""What every room uses and nothing of which knows of models, photos or commands."""
