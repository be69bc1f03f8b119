import threading
import time

from ray_jobs.cluster.watchdog import Watchdog


def test_a_process_without_a_sign_of_life_is_ended_after_it_said_so():
    told: list[float] = []
    ended = threading.Event()
    started = time.monotonic()
    Watchdog(0.2, told.append, ended.set)
    assert ended.wait(30)
    assert len(told) == 1
    assert 0.2 <= told[0] <= time.monotonic() - started


def test_signs_of_life_put_the_end_off():
    ended, started = threading.Event(), time.monotonic()
    watchdog = Watchdog(0.3, lambda silent_s: None, ended.set)
    while time.monotonic() - started < 1.0:
        watchdog.alive()
        assert not ended.wait(0.02)
    assert ended.wait(30)


def test_a_closed_watchdog_ends_nothing():
    ended = threading.Event()
    Watchdog(0.1, lambda silent_s: None, ended.set).close()
    assert not ended.wait(0.3)
