"""ChannelMatching ("MGD", 2020): the method, its schedule, statistics, assignment and reduction of channels."""

from .distiller import ChannelMatching

__all__ = ["ChannelMatching"]
