"""Evaluates concepts: scores of their images, and a report."""
