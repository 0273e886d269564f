"""A linear probe: logistic regression from hidden states to options, the baseline between no
training and training.

Owns the regression, how its strength is chosen, and which tasks it is for. Knows no models.
"""

import warnings
from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegressionCV
from sklearn.model_selection import StratifiedKFold

from orchestrator.config import ConfigError, Task
from orchestrator.tasks import TaskData
from orchestrator.templates import Template

FLAG = "--linear-probe"
NUM_FOLDS = 5
INVERSE_STRENGTHS = np.logspace(-4, 4, 10)  # of the penalty: scikit-learn's C
MAX_ITERATIONS = 5000

States = NDArray[np.float32]
"""[rows, hidden size]."""


def check(task: Task, data: TaskData) -> None:
    """Raises ConfigError for a task without classes, or with too few training rows of one."""
    if task.is_generated:
        raise ConfigError(f"{FLAG}: task.metric is {task.metric}: generated answers are no classes")
    for option in task.options:
        if Template.parse(option).only_field:
            raise ConfigError(f"{FLAG}: task.options: {option} differs by row; classes may not")
    if task.loss == "lm" and task.objective == "loss":
        raise ConfigError(
            f"{FLAG}: task.loss is lm, whose training rows keep the right option alone; set "
            "task.loss=option_ce"
        )
    counts = Counter(example.label for example in data.train)
    for number, option in enumerate(task.options):
        if counts[number] < NUM_FOLDS:
            raise ConfigError(
                f"{FLAG}: {counts[number]} of {len(data.train)} training rows are {option!r}; "
                f"{NUM_FOLDS}-fold cross-validation wants {NUM_FOLDS}; raise task.num_train"
            )


def fitted_scores(states: States, labels: Sequence[int], held_out: States) -> NDArray[np.float64]:
    """Log-probability of each option for each held-out row: [held-out rows, options].

    A multinomial logistic regression with an intercept and an L2 penalty, in float64, fitted to
    `states` and the numbers of their options. The penalty's strength is that of ten with the best
    accuracy in five-fold cross-validation over these rows, the strongest of equals; the folds are
    a function of the labels alone. So the answer is one of its arguments, to the last bits of the
    processor's sums. States are scaled together, by one number, to a mean square of 1, so that
    strengths mean the same for every model. Every option is some row's, at least NUM_FOLDS times.
    """
    scale = np.sqrt(np.mean(np.square(states, dtype=np.float64)))
    regression = LogisticRegressionCV(
        Cs=INVERSE_STRENGTHS,
        cv=StratifiedKFold(NUM_FOLDS),
        l1_ratios=(0.0,),
        scoring="accuracy",
        max_iter=MAX_ITERATIONS,
        use_legacy_attributes=False,
    )
    with warnings.catch_warnings():
        # The weakest penalties take the longest, and are seldom chosen.
        warnings.simplefilter("ignore", ConvergenceWarning)
        regression.fit(states / scale, np.asarray(labels))
    found: NDArray[np.float64] = regression.predict_log_proba(held_out / scale)
    return found
