"""The tasks of MeZO's suite (Malladi et al. 2023, appendix E) in the form of a recipe's `task`.

Data only: what a user could write in YAML. Fields are named as in the data sets on the hub.
"""

from typing import Any

HUB_GLUE, HUB_SUPER_GLUE = "hub:nyu-mll/glue", "hub:aps/super_glue"
FALSE_TRUE = ["false", "true"]  # how SuperGLUE's own files spell labels 0 and 1


def _from_hub(path: str, name: str | None = None) -> dict[str, Any]:
    """MeZO trains on rows of the train split and tests on the validation split."""
    return {
        "train": {"path": path, "name": name, "split": "train"},
        "test": {"path": path, "name": name, "split": "validation"},
    }


PRESETS: dict[str, dict[str, Any]] = {
    "sst2": {
        "template": "{sentence|strip} It was {option}",
        "options": ["terrible", "great"],
        "label_names": ["negative", "positive"],
        "unconditional": "It was {option}",
        **_from_hub(HUB_GLUE, "sst2"),
    },
    "rte": {
        "template": ('{premise}\nDoes this mean that "{hypothesis}" is true? Yes or No?\n{option}'),
        "options": ["Yes", "No"],
        "label_names": ["entailment", "not_entailment"],
        **_from_hub(HUB_SUPER_GLUE, "rte"),
    },
    "cb": {
        "template": (
            'Suppose {premise} Can we infer that "{hypothesis}"? Yes, No, or Maybe?\n{option}'
        ),
        "options": ["Yes", "No", "Maybe"],
        "label_names": ["entailment", "contradiction", "neutral"],
        **_from_hub(HUB_SUPER_GLUE, "cb"),
    },
    "boolq": {
        "template": "{passage} {question|as_question}\n{option}",
        # in this order, label numbers mean the same here as in SuperGLUE's copy of the task
        "options": ["No", "Yes"],
        "label": "answer",
        "label_names": FALSE_TRUE,
        **_from_hub("hub:google/boolq"),
    },
    "wsc": {
        "template": (
            '{text}\nIn the previous sentence, does the pronoun "{span2_text|lower}" refer to '
            "{span1_text}? Yes or No?\n{option}"
        ),
        "options": ["No", "Yes"],
        "label_names": FALSE_TRUE,
        **_from_hub(HUB_SUPER_GLUE, "wsc.fixed"),
    },
    "wic": {
        "template": (
            'Does the word "{word}" have the same meaning in these two sentences? Yes, No?\n'
            "{sentence1}\n{sentence2}\n{option}"
        ),
        "options": ["No", "Yes"],
        "label_names": FALSE_TRUE,
        **_from_hub(HUB_SUPER_GLUE, "wic"),
    },
    "multirc": {
        "template": (
            '{paragraph}\nQuestion: {question}\nI found this answer "{answer}". Is that correct? '
            "Yes or No?\n{option}"
        ),
        "options": ["No", "Yes"],
        "label_names": FALSE_TRUE,
        **_from_hub(HUB_SUPER_GLUE, "multirc"),
    },
    "copa": {
        "template": "{premise|without_full_stop} {question|as_connective} {option|lower_first}",
        "options": ["{choice1}", "{choice2}"],
        "label_names": ["choice1", "choice2"],
        "unconditional": "{question|as_connective} {option|lower_first}",
        "loss": "lm",
        **_from_hub(HUB_SUPER_GLUE, "copa"),
    },
    "record": {
        "template": "{passage|as_bullets}\n- {query|with_option}",
        "options": ["{entities}"],
        "label": "answers",
        "unconditional": "- {query|with_option}",
        "loss": "lm",
        **_from_hub(HUB_SUPER_GLUE, "record"),
    },
    "squad": {
        "template": (
            "Title: {title}\nContext: {context}\nQuestion: {question|strip}\nAnswer: {option}\n"
        ),
        "label": "answers.text",
        "loss": "lm",
        "metric": "f1",
        **_from_hub("hub:rajpurkar/squad"),
    },
    "drop": {
        "template": "Passage: {passage}\nQuestion: {question|strip}\nAnswer: {option}\n",
        "label": "answers_spans.spans",
        "loss": "lm",
        "metric": "f1",
        **_from_hub("hub:ucinlp/drop"),
    },
}
