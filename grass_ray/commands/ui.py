"""``grass-ray ui``: MLflow's page, opened at a sweep."""

from __future__ import annotations

import threading
import webbrowser
from dataclasses import dataclass

from grass_ray.commands.flags import tracking_store
from grass_ray.config import ConfigError
from grass_ray.errors import redact


@dataclass(frozen=True, kw_only=True)
class Ui:
    """Open MLflow's page at the newest sweep of a tracking store. Ctrl-C ends it.

    For example:
      grass-ray ui
      grass-ray ui --experiment quickstart --port 5001
      grass-ray ui --tracking-uri http://127.0.0.1:5000 --no-browser
    """

    experiment: str | None = None
    """Name of a sweep. Defaults to the newest of all."""
    tracking_uri: str | None = None
    """MLflow store. Defaults to MLFLOW_TRACKING_URI, else mlflow.db."""
    port: int = 5000
    """Port of the page, on this machine alone. No effect on a store that is a server."""
    browser: bool = True
    """Only print the address."""

    def run(self) -> int:
        """Serve the page until Ctrl-C, or print where a server shows it; returns the exit code."""
        from grass_ray.results.pages import find_page, is_server, serve

        if not 1 <= self.port <= 65535:
            raise ConfigError(f"--port {self.port} is no port; give 1 to 65535")
        uri = tracking_store(self.tracking_uri)
        page = find_page(uri, self.experiment)
        if is_server(uri):
            self._show(f"{uri.rstrip('/')}/{page}")
            return 0
        try:
            with serve(uri, port=self.port) as address:
                self._show(address + page)
                print("Ctrl-C ends it", flush=True)
                threading.Event().wait()
        except KeyboardInterrupt:
            pass
        return 0

    def _show(self, address: str) -> None:
        print(redact(address), flush=True)
        if self.browser:
            webbrowser.open(address)
