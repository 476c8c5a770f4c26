package main

import "syscall"

// childAttributes has the kernel end the child when this process is no more, however it ended;
// and a Ctrl-C of the terminal goes to this process alone, which ends the child itself.
func childAttributes() *syscall.SysProcAttr {
	return &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL, Setpgid: true}
}
