"""From photos to concepts: one run, or many concepts at once."""
