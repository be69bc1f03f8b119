from ray_jobs.cluster.capacity import workers_that_fit
from ray_jobs.config.spec import TrainSpec


def test_room_that_a_run_grows_into_is_there_when_it_starts_again():
    train = TrainSpec(global_batch_size=24, num_workers=(2, 4), cpus_per_worker=4)
    # Two workers on the larger node: what is free, with them, is no more than there is at all.
    assert workers_that_fit([{"CPU": 5}, {"CPU": 12}], train) == 4
    assert workers_that_fit([{"CPU": 5}, {"CPU": 4}], train) == 2
    assert workers_that_fit([{"CPU": 4}, {"CPU": 8}], train) == 2


def test_there_is_no_room_where_ray_data_would_have_no_cpu():
    assert workers_that_fit([{"CPU": 1}], TrainSpec()) == 0
    assert workers_that_fit([{"CPU": 2}], TrainSpec()) == 1
    assert workers_that_fit([{"CPU": 0.5}, {"GPU": 1}], TrainSpec()) == 0
    assert workers_that_fit([], TrainSpec()) == 0
