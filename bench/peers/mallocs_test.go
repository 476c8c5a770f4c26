package peers

import "runtime"

// mallocs counts the objects that the process has allocated, client and server
// alike. It stops the world, so it is called outside what is timed; cheaper ways to
// ask miss what the processors' caches have not reported yet.
func mallocs() uint64 {
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return m.Mallocs
}
