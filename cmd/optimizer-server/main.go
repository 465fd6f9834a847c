// Command optimizer-server traces the files one container touches.
package main

func main() {}
