"""Runs on images: their configuration, data, networks and task."""
