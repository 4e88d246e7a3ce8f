"""Predicts a training's memory and time from its configuration alone, before a weight is loaded."""

from ft_core.planning.blueprint import find_outline
from ft_core.planning.cards import CARDS, Card, card_here, find_card, with_memory
from ft_core.planning.engine import Plan, Planner, plan
from ft_core.planning.ways import ways

__all__ = ["CARDS", "Card", "Plan", "Planner", "card_here", "find_card", "find_outline", "plan", "ways", "with_memory"]
