"""Utilities: distributed communication, events and writers, logging, files, drawing."""
