"""`catversion serve`: personalization as a service, many people at once on one base model."""
