// Package share lets the mounts of a node use the chunks that others of them fetched.
//
// Three terms. A lender is a cache whose chunks are on this node: one that a mount has, or one that was left from earlier
// mounts. A borrower is the cache of a mount that is being filled ([Cache]); it asks before it fetches. A scope is where the
// bytes of a cache came from, and so who could have fetched them: [ScopePublic], the files of this machine, or a repository of a registry that asks who one is.
//
// What is lent is verified against its digest on the way, whatever the index says. Where the file system can (xfs, btrfs), the
// borrower's file gets the lender's blocks and is compared afterwards; else the bytes are copied, and those that were looked at are
// those that are written. copy_file_range(2) would be a second way through the same bytes, which have to be read anyway. What is not right is dropped from the index, told to the owner ([Options].Bad), and fetched.
package share
