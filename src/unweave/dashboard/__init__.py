"""A page of what an SAE's latents mean: a pass over tokens or images collects it, one HTML file shows it."""

from unweave.dashboard.build import dashboard
from unweave.dashboard.collect import Collected, Collector
from unweave.dashboard.images import image_dashboard
from unweave.dashboard.tokens import token_strings

__all__ = ["Collected", "Collector", "dashboard", "image_dashboard", "token_strings"]
