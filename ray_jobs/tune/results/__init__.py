"""Ranks the trials of a search, trains the best one and reports the results.

Input: the search, which the trials update. Output: leaderboard, page, best spec and best run.

search_state.py        the state of the search, its ranking and its Pareto front
searched_settings.py   the searched settings: names, ranges, values as text
leaderboard.py         the trials on the terminal, as log lines and as CSV
setting_importance.py  how much each setting explains
optuna_study.py        trials → Optuna study, for charts and importances
trial_charts.py        charts of the trials
tune_page.py           all of these → tune.html, with its template
best_run.py            best trials → full training, evaluation, summary
"""
