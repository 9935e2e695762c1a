"""NumPy computes on one thread while a small model is judged, and on as many as before after it and for a large one."""

from __future__ import annotations

import pytest

from gptj.parity import threads
from gptj.parity.revealing import revealing_config


@pytest.mark.skipif(threads._calls() is None, reason="NumPy's library is another one than OpenBLAS")
def test_small_models_take_one_thread_and_large_ones_all():
    calls = threads._calls()
    assert calls is not None
    get, put = calls
    before = get()
    put(2)
    try:
        with threads.few_threads(revealing_config()):
            assert get() == 1
        assert get() == 2
        with threads.few_threads(revealing_config(vocab_size=threads.SMALL)):
            assert get() == 2
        with pytest.raises(KeyError), threads.few_threads(revealing_config()):
            raise KeyError
        assert get() == 2
    finally:
        put(before)
