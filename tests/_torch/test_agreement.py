"""What a rank says of a step that it could not compile; the talk itself is tested with real processes."""

from __future__ import annotations

from unittest import mock

import pytest
from torch import distributed

from fxpass._torch.agreement import withdraw


@pytest.mark.skipif(not distributed.is_available(), reason="torch was built without c10d")
def test_a_store_that_is_gone_hides_no_error() -> None:
    from torch.distributed import distributed_c10d as c10d

    server = distributed.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    client = distributed.TCPStore("localhost", server.port, is_master=False, wait_for_workers=False)
    del server
    client_set = mock.Mock(wraps=client.set)
    store = mock.Mock(set=client_set)
    with (
        mock.patch.object(distributed, "is_initialized", return_value=True),
        mock.patch.object(distributed, "get_rank", return_value=0),
        mock.patch.object(c10d, "_get_default_store", return_value=store),
    ):
        withdraw(ValueError("what the user has to read"))
        withdraw(ValueError("once more: what was sent first may be taken by a socket that is closing"))
    assert client_set.call_count == 2
    with pytest.raises(distributed.DistError):
        client.set("the store", "is gone")
