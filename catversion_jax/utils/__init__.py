"""Helpers that every package uses; none of them knows about models, photos or commands."""
