// Package namespace makes, enters, furnishes and removes named network
// namespaces of a Linux host, where ip-netns(8) finds them too. It knows nothing
// of machines: what is joined to what is the business of the packages network
// and netns.
//
// Functions without a namespace among their arguments act on that of the calling
// thread; call them from within Within or Create.
package namespace
