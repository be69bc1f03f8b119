import threading
import time

from ray_jobs.cluster.hang_watchdog import Watchdog


def test_a_silent_process_is_ended_after_a_report():
    reported: list[float] = []
    ended = threading.Event()
    started = time.monotonic()
    Watchdog(0.2, reported.append, ended.set)
    assert ended.wait(30)
    assert len(reported) == 1
    assert 0.2 <= reported[0] <= time.monotonic() - started


def test_signs_of_life_restart_the_timeout():
    ended, started = threading.Event(), time.monotonic()
    watchdog = Watchdog(1.0, lambda silent_s: None, ended.set)
    while time.monotonic() - started < 1.5:
        watchdog.alive()
        assert not ended.wait(0.02)
    assert ended.wait(30)


def test_a_closed_watchdog_ends_nothing():
    ended = threading.Event()
    Watchdog(0.1, lambda silent_s: None, ended.set).close()
    assert not ended.wait(0.3)
