"""What is loaded, and why the rest is not."""

import platform
from dataclasses import dataclass

import torch

from unigen_fast._loader import Backend


@dataclass(frozen=True)
class Info:
    """Printed, one line per fact."""

    version: str
    torch: str
    python: str
    device: str
    backends: tuple[Backend, ...]

    def __str__(self) -> str:
        lines = [f"unigen_fast {self.version}, torch {self.torch}, Python {self.python}, {self.device}"]
        lines += [str(backend) for backend in self.backends]
        if not any(backend.loaded for backend in self.backends):
            lines.append("no kernels: every function runs its plain PyTorch reference")
        return "\n".join(lines)


def collect(version: str, backends: tuple[Backend, ...]) -> Info:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU ({torch.get_num_threads()} threads)"
    return Info(version, torch.__version__, platform.python_version(), device, backends)
