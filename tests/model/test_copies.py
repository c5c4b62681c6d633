import pytest
import torch

from vila_ops.model.copies import Copies


@pytest.mark.gpu
@pytest.mark.skipif(not torch.accelerator.is_available(), reason="needs a GPU")
def test_memory_is_used_again_only_when_its_readers_are_done() -> None:
    """Many copies in both directions behind a busy device, each from memory that is given back at once."""
    device = torch.accelerator.current_accelerator()
    assert device is not None
    copies = Copies(device)
    heavy = torch.randn(4096, 4096, device=device)
    sums, returned = [], []
    for number in range(100):
        sent = copies.to_device(copies.empty(1024, 1024, dtype=torch.float32).fill_(number))
        heavy = heavy @ heavy / 4096
        arrived = copies.arrived(sent)
        sums.append(arrived.double().mean())
        returned.append(copies.to_host(arrived + 1))
        del sent, arrived
    assert torch.stack(sums).tolist() == list(range(100))
    for number, wait in enumerate(returned):
        assert (wait() == number + 1).all()
