"""What holds on every transport, over the host kernel's vsock: the tests are those of tests/vm/test_transports.py."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.vm import test_transports as every
from tests.vm.test_transports import (  # noqa: F401 - pytest finds them here, too
    test_a_cancelled_program_is_killed,
    test_a_host_that_comes_back_starts_afresh,
    test_a_program_of_every_length_of_output_says_all_of_it,
    test_a_program_that_prints_without_end_delays_nobody,
    test_bytes_pass_to_the_guest_and_back_unchanged,
    test_each_direction_ends_by_itself,
    test_garbage_is_survived,
    test_many_programs_at_once_are_not_mixed,
    test_much_input_arrives_whole_in_bounded_memory,
    test_much_output_arrives_whole_in_bounded_memory,
    test_who_reads_slowly_slows_the_program_down,
)
from tests.vsock.conftest import patient

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from pbotvm_qemu.machine import VirtualMachine

pytestmark = pytest.mark.vm


@pytest.fixture(scope="module")
async def vm(env: dict[str, str]) -> AsyncIterator[VirtualMachine]:
    """One clone, reached over vsock."""
    with patient(env):
        machine = await every.way(env, "vsock").start()
        try:
            assert machine.hello
            assert (machine.hello.transport, machine.transport_why) == ("vsock", "")
            yield machine
        finally:
            await machine.stop()
