"""Runs on text: their configuration, data, networks and tasks."""
