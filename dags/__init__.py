"""The corpus as graphs of commands, and what submits them to Ray from Airflow."""
