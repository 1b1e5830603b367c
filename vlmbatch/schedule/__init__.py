"""``vlmbatch schedule``: what starts a job spec every night, for several schedulers."""

TARGETS = ("cron", "systemd", "kubernetes", "kuberay", "slurm", "airflow", "actions")
