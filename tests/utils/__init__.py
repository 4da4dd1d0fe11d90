"""Tests of the room utils."""
