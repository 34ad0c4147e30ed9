"""What an operator decides about a page."""

import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Settings:
    """
    models: What may be chosen; None for the default of `timm_senetv2.demo.choices.Choices`.
    allow_hub: Visitors may type any model of this package on the Hub.
    host: Name or address to listen on.
    port: 0 for any that is free.
    share: Open a public link through Gradio's servers.
    timeout: Seconds that a visitor waits at most.
    """

    models: Sequence[str] | None = None
    allow_hub: bool = False
    host: str = '127.0.0.1'
    port: int = 7860
    share: bool = False
    timeout: float = 60.0

    @property
    def public(self) -> bool:
        """Whether others than this machine's own users can reach the page."""
        return self.share or not _is_loopback(self.host)


def _is_loopback(host: str) -> bool:
    if host == 'localhost':
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
