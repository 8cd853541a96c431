import threading

import jax.numpy as jnp
import pytest

from jaxplan.core.ahead import begin_ahead


def test_results_come_in_order_whoever_is_ready_first():
    gates = [threading.Event() for _ in range(6)]

    def work(item):
        if item:
            gates[item].wait(5)
        return jnp.full(2, item)

    results = begin_ahead(range(6), work)
    for number in range(6):
        for gate in reversed(gates):
            gate.set()
        item, array = next(results)
        assert item == number
        assert array.tolist() == [number, number]
    assert list(results) == []


def test_the_first_is_alone_and_the_next_are_side_by_side(monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    lock, busy, most = threading.Lock(), set(), {}
    meeting = threading.Barrier(2, timeout=10)

    def work(item):
        with lock:
            busy.add(item)
            most[item] = len(busy)
        if item in (1, 2):
            meeting.wait()  # neither goes on before the other has come
        with lock:
            busy.discard(item)
        return item

    assert [item for item, _ in begin_ahead(range(4), work)] == [0, 1, 2, 3]
    assert most[0] == 1
    assert max(most[1], most[2]) == 2


def test_nothing_to_do_is_nothing():
    assert list(begin_ahead([], lambda item: item)) == []


def test_a_failure_is_told_in_its_turn_and_ends_it():
    def work(item):
        if item == 1:
            raise ValueError("no world")
        return item

    results = begin_ahead(range(50), work)
    assert next(results) == (0, 0)
    with pytest.raises(ValueError, match="no world"):
        next(results)


def test_who_stops_listening_stops_the_work():
    done = []
    results = begin_ahead(range(1000), lambda item: done.append(item))
    next(results)
    results.close()
    assert len(done) < 100
