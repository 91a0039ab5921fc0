"""How long a test waits before it calls a process, a thread or a message lost."""

#: Seconds. Only a defect reaches it: on a busy machine everything takes many times as long as on an idle one.
HANG_S = 300.0
