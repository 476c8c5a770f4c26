//go:build gozero

package balancing

import (
	"github.com/zeromicro/go-zero/core/logx"
	_ "github.com/zeromicro/go-zero/zrpc" // registers "p2c_ewma"
)

// go-zero's balancer cannot be had without zrpc, and zrpc not without clients of etcd and
// Kubernetes, which take minutes to build: hence the tag.
func init() {
	policies = append(policies, policy{name: "go-zero", balancer: "p2c_ewma"})
	logx.Disable() // its balancer and its process statistics write to stdout
}
