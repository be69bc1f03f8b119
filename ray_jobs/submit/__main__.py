"""Run `submit` from the command line."""

from ray_jobs.submit.job import main

if __name__ == "__main__":
    main()
