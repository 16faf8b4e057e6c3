"""No tasks: lmms-eval stops if a plugin that `LMMS_EVAL_PLUGINS` names has no such package."""
