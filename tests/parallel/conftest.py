from collections.abc import Iterator

import pytest
import torch

from r1fast.parallel.mesh import Dist, init_distributed


@pytest.fixture
def dist() -> Iterator[Dist]:
    """World size 1, in this process, without a launcher."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # tiny tensors: a second thread costs barriers, 10x and more on a busy machine
    torch.manual_seed(0)
    dist = init_distributed("cpu")
    yield dist
    dist.close()
    torch.set_num_threads(num_threads)
