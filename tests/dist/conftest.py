from collections.abc import Iterator

import pytest
import torch

from r1fast.dist.mesh import Dist, init_distributed


@pytest.fixture
def dist() -> Iterator[Dist]:
    """World size 1, in this process, without a launcher."""
    torch.manual_seed(0)
    dist = init_distributed("cpu")
    yield dist
    dist.close()
