"""What a process is told before it imports anything heavy."""

import gc

from orchestrator import environment


def test_no_garbage_is_collected_while_modules_are_imported() -> None:
    before = gc.get_freeze_count()
    with environment.importing():
        assert not gc.isenabled()
        with environment.importing():
            assert not gc.isenabled()
        assert not gc.isenabled()
    assert gc.isenabled()
    assert gc.get_freeze_count() > before
    gc.unfreeze()
