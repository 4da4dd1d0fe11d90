"""Trains concepts on photos: in a run of one concept, or many concepts at once."""
