"""Collectives of CPU workers on one host through shared memory: the backend that a run without GPUs trains over.

Gloo carries everything through TCP. Between two processes of one machine that costs a thread, several system calls and
four copies a collective: half a millisecond for a few bytes and one and a half for a mebibyte, where the copy itself
takes a tenth (docs/experiments.md). A step has eight of them. Here a worker lays its part into memory that the others
have mapped and rings a bell, a message on a Unix socket:

    slot = number of the exchange mod 4       one anonymous file (memfd) a worker and slot, grown as it is needed
    bell = (number, what, offset, bytes)      and the file, where it is new

Nothing has a name once all are joined, so nothing is left by processes that are killed. A worker that dies, or whose
group fails, closes its sockets, and the others hear of it at once. Sums are made in the order of ranks, the same bits
on all. Each bell says which collective it is of and which type, so workers that do not call the same one all fail.

A slot is laid out anew four exchanges later. Before exchange k a worker finishes its own up to k - 2, for which all the
others must have begun k - 2, so they are done with k - 4. Who may wait for whom never turns into a circle: beginning an
exchange waits for earlier ones only, and these every worker begins first. So beginning one may wait, also where the
caller asked not to: who mixes these with messages to single ranks has to begin the latter first.

All-to-all, all-gather, reduce-scatter, sums and barriers go this way; the rest (objects, other reductions) is gloo's,
and everything is where the workers do not share a host: `register` names the backend, and a group finds out by itself.

Shape suffixes: W = workers.
"""

from __future__ import annotations

import contextlib
import logging
import mmap
import os
import select
import socket
import struct
import tempfile
from collections import deque
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

BACKEND = "watchtower"
"""Its name, for `init_process_group`, once `register` was called in the process."""
SLOTS = 4
SMALL_SUM_BYTES = 1 << 15
"""Up to here every worker adds all parts up by itself: twice the reading, half the exchanges."""
LARGE_SUM_BYTES = 1 << 24
"""Longer sums go piece by piece, so that memory shared does not grow with the model."""
_LEAST_BYTES = 1 << 16
_ALIGN = 64  # of pieces in a slot, so that any type may be read there
_BELL = struct.Struct("<Q16sQQ")
_RANK = struct.Struct("<Q")


def register() -> None:
    """Makes the backend known to torch.distributed in this process. May be called again."""
    if not hasattr(dist.Backend, BACKEND.upper()):
        dist.Backend.register_backend(BACKEND, _create, devices=["cpu"])


class SharedMemoryGroup(dist.ProcessGroup):
    """A process group of workers on one host. Every worker calls the same collectives in one order, from one thread.

    Args:
        store, rank, size: as of any process group. gloo: does what is not done here; its timeout is the group's.
        bells: a connected SOCK_SEQPACKET socket to every other rank.
    """

    def __init__(self, store: dist.Store, rank: int, size: int, gloo: dist.ProcessGroupGloo,
                 bells: dict[int, socket.socket]):
        super().__init__(rank, size)
        self._set_default_backend(dist.ProcessGroup.BackendType.GLOO)
        self._register_backend(torch.device("cpu"), dist.ProcessGroup.BackendType.GLOO, gloo)
        self._gloo, self._bells, self._me, self._ranks = gloo, bells, rank, size
        self._begun = 0
        self._pending: deque[_Exchange] = deque()
        self._memory: dict[tuple[int, int], Tensor] = {}  # (rank, slot): uint8
        self._failed: str | None = None

    def all_to_all_single(self, output: Tensor, input: Tensor, output_splits: Sequence[int],  # noqa: A002
                          input_splits: Sequence[int], opts: Any = None) -> dist.Work:
        """Rows of `input` to each rank, rows from each into `output`. Without splits all ranks get as many."""
        _check_types(output, input)
        pieces = _split(input, input_splits, self._ranks)
        return self._place("to", output.dtype, _split(output, output_splits, self._ranks), pieces)

    def all_gather_single(self, output: Tensor, input: Tensor, opts: Any = None) -> dist.Work:  # noqa: A002
        """`input` of all ranks in rank order into `output`."""
        _check_types(output, input, output.numel() == self._ranks * input.numel())
        return self._place("gather", output.dtype, _split(output, (), self._ranks), [_as_bytes(input)] * self._ranks)

    def reduce_scatter_single(self, output: Tensor, input: Tensor, opts: Any) -> dist.Work:  # noqa: A002
        """The sum over ranks of each rank's share of `input` into its `output`."""
        if opts.reduceOp != dist.ReduceOp.SUM:
            return self._gloo._reduce_scatter_base(output, input, opts)
        _check_types(output, input, self._ranks * output.numel() == input.numel())
        mine, pieces = _flat(output), _split(input, (), self._ranks)
        return self._begin("scatter", mine.dtype, pieces, lambda parts_W: _add_up(mine, parts_W),
                           own=pieces[self._me].clone())

    def allreduce(self, tensors: Sequence[Tensor], opts: Any) -> dist.Work:
        """The sum over ranks, in place."""
        if opts.reduceOp != dist.ReduceOp.SUM or len(tensors) != 1:
            return self._gloo.allreduce(list(tensors), opts)
        tensor = tensors[0]
        if not tensor.is_contiguous():
            summed = tensor.contiguous()
            self.allreduce([summed], opts).wait()
            tensor.copy_(summed)
            return self._done()
        flat, work = _flat(tensor), None
        for piece in flat.split(max(1, LARGE_SUM_BYTES // tensor.element_size())):
            work = self._sum(piece)
        return work or self._done()

    def barrier(self, opts: Any = None) -> dist.Work:
        """Returns once all ranks have begun it, and waits on the way: who calls it without asking waits, too."""
        nothing = torch.empty(0, dtype=torch.uint8)
        work = self._begin("barrier", nothing.dtype, [nothing] * self._ranks, lambda parts_W: None, nothing)
        work.wait()
        return work

    def shutdown(self) -> None:
        """Closes the bells: a rank that still waits for this one fails."""
        self._broken("it was shut down")
        self._memory.clear()

    def getBackendName(self) -> str:  # noqa: N802 - torch's
        return BACKEND

    def _sum(self, flat: Tensor) -> dist.Work:
        """Of a short tensor each rank makes it whole; of a long one its share, which the others then take."""
        if flat.numel() * flat.element_size() <= SMALL_SUM_BYTES:
            whole = _as_bytes(flat)
            return self._begin("sum", flat.dtype, [whole] * self._ranks, lambda parts_W: _add_up(flat, parts_W),
                               own=whole.clone())
        share = -(-flat.numel() // self._ranks)
        shares = [flat[share * rank : share * (rank + 1)] for rank in range(self._ranks)]
        mine, pieces = shares[self._me], [_as_bytes(part) for part in shares]
        self._begin("shares", flat.dtype, pieces, lambda parts_W: _add_up(mine, parts_W),
                    own=pieces[self._me].clone()).wait()
        return self._place("sums", flat.dtype, pieces, [pieces[self._me]] * self._ranks)

    def _place(self, what: str, dtype: torch.dtype, outputs_W: list[Tensor], pieces_W: list[Tensor]) -> dist.Work:
        """Each rank's piece to where it goes; the own one at once."""
        own = pieces_W[self._me]

        def take(parts_W: list[Tensor]) -> None:
            for rank, (mine, part) in enumerate(zip(outputs_W, parts_W, strict=True)):
                if len(mine) != len(part):
                    raise ValueError(f"rank {rank} sends {len(part):,} bytes, {len(mine):,} are expected of it")
                if rank != self._me:
                    mine.copy_(part)

        if len(own) == len(outputs_W[self._me]):
            outputs_W[self._me].copy_(own)
        return self._begin(what, dtype, pieces_W, take, own)

    def _begin(self, what: str, dtype: torch.dtype, pieces_W: list[Tensor], take: Callable[[list[Tensor]], None],
               own: Tensor) -> dist.Work:
        """Lays the other ranks' pieces into this exchange's slot and rings. `take` gets the pieces that the ranks have
        for this one, `own` among them, once all have rung."""
        if self._failed:
            raise dist.DistNetworkError(self._failed)
        number, self._begun = self._begun, self._begun + 1
        self._finish(number - 2)
        exchange = _Exchange(self, number, f"{what} {str(dtype)[6:]}".encode()[:16], take, own)
        try:
            self._lay_out(exchange, pieces_W)
        except OSError as error:
            raise self._broken(f"no memory or file for what it sends ({error.strerror})") from error
        self._pending.append(exchange)
        return exchange

    def _lay_out(self, exchange: _Exchange, pieces_W: list[Tensor]) -> None:
        laid, end = {}, 0  # one piece may be for all
        for rank in self._bells:
            piece = pieces_W[rank]
            if id(piece) not in laid:
                laid[id(piece)] = end, piece
                end += -(-len(piece) // _ALIGN) * _ALIGN
        self._limit()
        memory, new = self._room(exchange.number % SLOTS, end)
        for offset, piece in laid.values():
            memory[offset : offset + len(piece)].copy_(piece)
        try:
            for rank, bell in self._bells.items():
                piece = pieces_W[rank]
                self._ring(rank, bell, _BELL.pack(exchange.number, exchange.what, laid[id(piece)][0], len(piece)), new)
        finally:
            if new is not None:
                os.close(new)

    def _finish(self, last: int) -> None:
        """Takes what belongs to the exchanges up to this one."""
        while self._pending and self._pending[0].number <= last:
            if self._failed:
                raise dist.DistNetworkError(self._failed)
            exchange = self._pending[0]
            parts_W = [exchange.own if rank == self._me else self._hear(rank, exchange) for rank in range(self._ranks)]
            try:
                exchange.take(parts_W)
            except ValueError as error:
                raise self._broken(str(error)) from None
            self._pending.popleft()

    def _room(self, slot: int, size: int) -> tuple[Tensor, int | None]:
        """This worker's memory for the slot, and its file where the others do not have it yet."""
        memory = self._memory.get((self._me, slot))
        if memory is not None and len(memory) >= size:
            return memory, None
        size = -(-(size + size // 4) // _LEAST_BYTES) * _LEAST_BYTES or _LEAST_BYTES
        file = os.memfd_create(f"watchtower-slot-{slot}")
        try:
            os.ftruncate(file, size)
            memory = self._memory[self._me, slot] = _mapped(file)
        except BaseException:
            os.close(file)
            raise
        return memory, file

    def _ring(self, rank: int, bell: socket.socket, message: bytes, file: int | None) -> None:
        try:
            if file is None:
                bell.send(message)
            else:
                socket.send_fds(bell, [message], [file])
        except TimeoutError:
            raise self._broken(f"rank {rank} has not listened for {self._timeout_s:g} s") from None
        except OSError as error:
            raise self._broken(f"rank {rank} is gone ({error.strerror})") from None

    def _hear(self, rank: int, exchange: _Exchange) -> Tensor:
        """Waits for the rank's bell; what it laid out for this one."""
        try:
            message, files, flags, _ = socket.recv_fds(self._bells[rank], _BELL.size, 1)
        except TimeoutError:
            raise self._broken(f"rank {rank} has not come to the collective for {self._timeout_s:g} s") from None
        except OSError as error:
            raise self._broken(f"rank {rank} is gone ({error.strerror})") from None
        slot = rank, exchange.number % SLOTS
        for file in files:
            try:
                self._memory[slot] = _mapped(file)
            except OSError as error:
                raise self._broken(f"memory of rank {rank} cannot be mapped ({error.strerror})") from None
            finally:
                os.close(file)
        if not message:
            raise self._broken(f"rank {rank} is gone (it closed its socket)")
        if flags & (socket.MSG_CTRUNC | socket.MSG_TRUNC):  # the kernel had no number for the file
            raise self._broken(f"no open file is left for memory of rank {rank}; raise ulimit -n")
        number, what, offset, size = _BELL.unpack(message)
        what = what.rstrip(b"\0")
        if (number, what) != (exchange.number, exchange.what):
            raise self._broken(f"rank {rank} is at its collective {number} ({what.decode()}), this one at "
                               f"{exchange.number} ({exchange.what.decode()})")
        if offset + size > len(self._memory.get(slot, ())):
            raise self._broken(f"rank {rank} tells of memory that it never handed over")
        return self._memory[slot][offset : offset + size]

    def _has_rung(self) -> bool:
        """Whether every other rank has; of what is pending first."""
        bells = select.poll()  # select() knows no file beyond the first 1,024
        for bell in self._bells.values():
            bells.register(bell, select.POLLIN)
        return len(bells.poll(0)) == len(self._bells)

    @property
    def _timeout_s(self) -> float:
        return self._gloo.options._timeout.total_seconds()

    def _limit(self) -> None:
        """Gives the bells the group's timeout, which may have changed."""
        seconds = self._timeout_s
        for bell in self._bells.values():
            if bell.gettimeout() != seconds:
                bell.settimeout(seconds)

    def _broken(self, why: str) -> Exception:
        """The error to raise; no collective of this group works after, here or on the others, who hear of it."""
        self._failed = self._failed or f"collective of rank {self._me} of {self._ranks}: {why}"
        for bell in self._bells.values():
            bell.close()
        return dist.DistNetworkError(self._failed)

    def _done(self) -> dist.Work:
        """Of what has already ended."""
        return _Exchange(self, -1, b"", lambda parts_W: None, torch.empty(0, dtype=torch.uint8))

    def all_gather_single_coalesced(self, outputs: Sequence[Tensor], inputs: Sequence[Tensor], opts: Any = None
                                    ) -> dist.Work:
        """`all_gather_single` of each; all are over when the last one is."""
        works = [self.all_gather_single(*both, opts) for both in zip(outputs, inputs, strict=True)]
        return works[-1] if works else self._done()

    def reduce_scatter_single_coalesced(self, outputs: Sequence[Tensor], inputs: Sequence[Tensor], opts: Any
                                        ) -> dist.Work:
        """`reduce_scatter_single` of each; waits for all but the last, for gloo's are not over in order."""
        works = [self.reduce_scatter_single(*both, opts) for both in zip(outputs, inputs, strict=True)]
        for work in works[:-1]:
            work.wait()
        return works[-1] if works else self._done()

    # The names that torch asks by up to 2.12.
    alltoall_base, _allgather_base, _reduce_scatter_base = all_to_all_single, all_gather_single, reduce_scatter_single
    allgather_into_tensor_coalesced = all_gather_single_coalesced
    reduce_scatter_tensor_coalesced = reduce_scatter_single_coalesced


def _by_gloo(name: str) -> Callable[..., dist.Work]:
    def collective(self: SharedMemoryGroup, *arguments: Any, **named: Any) -> dist.Work:
        return getattr(self._gloo, name)(*arguments, **named)

    collective.__name__ = name
    return collective


# Never what a ProcessGroup inherits: called from Python, that holds the interpreter's lock while it waits for gloo's,
# and gloo's thread, which frees tensors, waits for the interpreter's while it holds its own.
for _name in ("allgather", "allgather_coalesced", "allreduce_coalesced", "alltoall", "broadcast", "gather",
              "monitored_barrier", "recv", "recv_anysource", "reduce", "reduce_scatter", "scatter", "send"):
    setattr(SharedMemoryGroup, _name, _by_gloo(_name))


class _Exchange(dist.Work):
    """One exchange that has begun. what: collective and type, of all ranks the same. own: this rank's piece for itself.
    """

    def __init__(self, group: SharedMemoryGroup, number: int, what: bytes, take: Callable[[list[Tensor]], None],
                 own: Tensor):
        super().__init__()
        self.number, self.what, self.take, self.own, self._group = number, what, take, own, group

    def wait(self, timeout: timedelta | None = None) -> bool:
        self._group._finish(self.number)
        return True

    def is_completed(self) -> bool:
        pending = self._group._pending
        while pending and pending[0].number <= self.number:
            if not self._group._has_rung():
                return False
            self._group._finish(pending[0].number)
        return True


def _create(store: dist.Store, rank: int, size: int, timeout: timedelta) -> Any:
    """The group through shared memory where all ranks can have it, else gloo's; alike on all ranks."""
    gloo = dist.ProcessGroupGloo(dist.PrefixStore("gloo", store), rank, size, timeout=timeout)
    bells = None if size == 1 else _meet(dist.PrefixStore("bells", store), rank, size, timeout.total_seconds())
    return gloo if bells is None else SharedMemoryGroup(store, rank, size, gloo, bells)


def _meet(store: dist.Store, rank: int, size: int, timeout_s: float) -> dict[int, socket.socket] | None:
    """A socket to every other rank; None on all ranks, if one of them cannot reach another."""
    def told(what: str, mine: str) -> list[str]:
        store.set(f"{what}/{rank}", mine)
        return [store.get(f"{what}/{other}").decode() for other in range(size)]

    with contextlib.ExitStack() as closing:
        listener, place = None, ""
        with contextlib.suppress(OSError, AttributeError):  # no such sockets or files here: said by the empty place
            folder = closing.enter_context(tempfile.TemporaryDirectory(prefix="watchtower-bells-"))
            os.close(os.memfd_create("watchtower-probe"))
            listener = closing.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
            listener.bind(f"{folder}/bell")
            listener.listen(size)
            place = f"{_host()} {folder}/bell"
        places = told("place", place)
        if len({place.split()[0] for place in places if place}) > 1:
            return None
        if not all(places):
            return _over_tcp(rank, "one of them has no socket or memory to share: is the path of TMPDIR long?")
        bells: dict[int, socket.socket] = {}
        with contextlib.ExitStack() as failing:
            try:
                for other in range(rank):
                    bell = failing.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
                    bell.settimeout(timeout_s)
                    bell.connect(places[other].split(maxsplit=1)[1])
                    bell.send(_RANK.pack(rank))
                    bells[other] = bell
                reached = "yes"
            except OSError:  # a container of its own, with a file system of its own
                reached = "no"
            if "no" in told("reached", reached):
                return _over_tcp(rank, "one of them cannot reach another's socket: do they share their TMPDIR?")
            listener.settimeout(timeout_s)
            while len(bells) < size - 1:
                try:
                    bell = failing.enter_context(listener.accept()[0])
                    bell.settimeout(timeout_s)
                    message = bell.recv(_RANK.size)
                except OSError as error:
                    raise dist.DistNetworkError(f"rank {rank}: a worker has not joined the group ({error})") from None
                other = _RANK.unpack(message)[0] if len(message) == _RANK.size else size
                if rank < other < size and other not in bells:  # else it is none of this group
                    bells[other] = bell
            failing.pop_all()
        told("joined", "yes")  # until all are, the folder stays
        return dict(sorted(bells.items()))


def _over_tcp(rank: int, why: str) -> None:
    if rank == 0:
        logging.getLogger(__name__).warning("the workers of this host train over TCP, which is slower: %s", why)


def _host() -> str:
    """The same for all processes of one kernel and one network: what has another address is another host, though a
    socket's file may be reached from there."""
    network = os.stat("/proc/self/ns/net")
    return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()}-{network.st_dev}-{network.st_ino}"


def _mapped(file: int) -> Tensor:
    """uint8, the whole file, shared with whoever maps it; it may be closed after."""
    with torch.inference_mode(False):  # it outlives the mode that it may be made in
        return torch.frombuffer(mmap.mmap(file, os.fstat(file).st_size), dtype=torch.uint8)


def _flat(tensor: Tensor) -> Tensor:
    if tensor.device.type != "cpu" or not tensor.is_contiguous():
        raise ValueError(f"the {BACKEND} backend takes contiguous tensors on the CPU, not one on {tensor.device} with "
                         f"strides {tensor.stride()}")
    return tensor.detach().view(-1)


def _check_types(output: Tensor, input: Tensor, fits: bool = True) -> None:  # noqa: A002
    if output.dtype != input.dtype or not fits:
        raise ValueError(f"{tuple(output.shape)} of {output.dtype} cannot take what comes of {tuple(input.shape)} of "
                         f"{input.dtype} in this collective")


def _as_bytes(tensor: Tensor) -> Tensor:
    return _flat(tensor).view(torch.uint8)


def _split(tensor: Tensor, rows: Sequence[int], ranks: int) -> list[Tensor]:
    """The bytes of so many rows for each rank."""
    flat, count = _as_bytes(tensor), len(tensor)
    if not len(rows):
        if count % ranks:
            raise ValueError(f"{count} rows are not as many for each of {ranks} ranks")
        return list(flat.chunk(ranks)) if count else [flat] * ranks
    if len(rows) != ranks or sum(rows) != count:
        raise ValueError(f"{list(rows)} rows for {ranks} ranks, of a tensor with {count}")
    width = len(flat) // count if count else 0
    return list(flat.split([size * width for size in rows]))


def _add_up(out: Tensor, parts_W: list[Tensor]) -> None:
    """The sum of the parts in rank order; `out` is none of them."""
    for rank, part in enumerate(parts_W):
        if len(part) != out.numel() * out.element_size():
            raise ValueError(f"rank {rank} adds {len(part):,} bytes, {out.numel() * out.element_size():,} are expected "
                             "of it")
    first, *more = (part.view(out.dtype) for part in parts_W)
    out.copy_(first)
    for part in more:
        out.add_(part)
