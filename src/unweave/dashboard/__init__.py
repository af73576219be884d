"""A page of what an SAE's latents mean: one pass over tokens collects it, one HTML file shows it."""

from unweave.dashboard.build import dashboard
from unweave.dashboard.collect import Collected, Collector
from unweave.dashboard.tokens import token_strings

__all__ = ["Collected", "Collector", "dashboard", "token_strings"]
